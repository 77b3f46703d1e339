"""The loop of rounds: who is there, who is asked, what is let in."""
