"""What runs in the sandboxed process. It uses the standard library alone: Python is started with -S."""
