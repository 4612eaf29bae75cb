"""Planning: from what was measured and a budget to what every head gets."""
