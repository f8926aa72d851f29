"""Towers, mining, decoder: arrays in, arrays out; nothing here knows files, text or configs files."""
