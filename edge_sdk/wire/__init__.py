"""What both sides must agree on, as pure code: no sockets, clocks, files, numpy or torch."""
