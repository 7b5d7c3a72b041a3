"""What a model is: its files, its architecture, its memory, and how it comes here."""
