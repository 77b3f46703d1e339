"""Parts of pages, each by whoever has something to say: of configurations, or a method of itself."""
