"""From planned IR to programs of a target. Each target has a folder; what targets share is here and knows none."""
