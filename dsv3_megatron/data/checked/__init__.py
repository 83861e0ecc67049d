"""What is read of large files, compared with checksums before it is used."""
