"""Reference implementations of Tamiyo and Kasmina, served by `tolaria peer`."""
