"""The `tolaria` command line: runs the service, queries and controls a running one, inspects what it stored."""
