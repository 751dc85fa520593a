"""Showing: figures with alternative text, and widgets that redraw or turn like a flipbook."""
