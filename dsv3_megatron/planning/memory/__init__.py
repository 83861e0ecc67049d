"""Bytes that every rank holds, by the real modules or by formula."""
