"""What a person uses: health and the local API."""
