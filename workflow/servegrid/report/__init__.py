"""Results for people: tables, figures, Markdown and the HTML page."""
