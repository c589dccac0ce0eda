"""The decoder, its adapters, sampling, and log-probabilities of given responses."""
