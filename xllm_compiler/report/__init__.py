"""Pictures of a compile: one HTML page and Chrome-trace timelines. Public names live in page.py and timeline.py."""
