"""What `mg3d bench` measures. Nothing else imports this folder."""
