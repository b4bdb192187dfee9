"""Linear layers over packed weight panels, of every weight format."""
