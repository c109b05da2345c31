"""What converted models attend to: maps and numbers of single images, as a page, a picture or JSON."""
