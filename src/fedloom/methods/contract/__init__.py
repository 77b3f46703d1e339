"""The contract of methods: method, client, checks, evaluation."""
