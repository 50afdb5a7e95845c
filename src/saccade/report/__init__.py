"""Reports: the card of a part, and the HTML page of a comparison; no logic of their own."""
