"""What several scorers share: CLIP-like networks, files and hub ids, and fixes for old packages. No scorer and no registry."""
