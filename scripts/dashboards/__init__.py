"""The dashboards of deploy/grafana, made with Grafana's own library, and pictures of them."""
