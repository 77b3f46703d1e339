"""Parts of pages, each by whoever has something to say: a comparison's arms, or a method of itself."""
