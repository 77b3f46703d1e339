"""Keys, certificates, the registry of clients, the audit log."""
