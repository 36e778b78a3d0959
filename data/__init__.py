"""Text in, uint16 bins out, and the reader that trains from them."""
