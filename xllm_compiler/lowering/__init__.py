"""From planned IR to programs of a target. One folder per target; what they share stands here and knows no target."""
