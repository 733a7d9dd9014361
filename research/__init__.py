"""What produces the evidence in results/ and the tables of the pages; no user needs it."""
