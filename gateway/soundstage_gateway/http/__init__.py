"""The gateway over HTTP, for players and pages."""
