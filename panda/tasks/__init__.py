"""What is learned: from text to token ids and labels, and the loss."""
