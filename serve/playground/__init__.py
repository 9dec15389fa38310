"""The playground at `/`: ask models side by side in a browser. One self-contained page; it holds no data."""
