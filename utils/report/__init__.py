"""What a run would be trained on, for people to look at: tables for the console, and a page with pictures."""
