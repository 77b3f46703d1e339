"""Keys, certificates, the registry of clients, the audit log, bounds on who connects."""
