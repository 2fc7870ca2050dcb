"""What people look at: tables, figures, Markdown and the HTML page."""
