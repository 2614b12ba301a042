"""What the page is made of: recordings judged, their pictures and panels, the page's tabs."""
