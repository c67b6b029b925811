"""The yard: a supervising gateway. One public port, engines that are kept up, moves that lose no request."""
