"""Examples; a test runs each of them."""
