"""Pictures as text: SVG and HTML that need no other file, no script and no font."""
