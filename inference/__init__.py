"""A saved system and recordings in, results on disk out."""
