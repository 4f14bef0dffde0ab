"""Runs side by side: tables, a page, pictures. Starts without torch."""
