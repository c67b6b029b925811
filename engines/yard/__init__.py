"""The yard: one public port that never lies, engines that are supervised, moves that lose nothing."""
