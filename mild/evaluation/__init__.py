"""Methods compared on the same samples, and the page that shows it."""
