"""Towers, mining, decoder: arrays in, arrays out; nothing here knows files or text."""
