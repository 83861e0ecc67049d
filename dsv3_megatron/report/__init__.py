"""report.html: what a run did, in one file that needs no network, no script and no server."""
