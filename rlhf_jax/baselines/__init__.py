"""What PPO is compared with: choosing among samples, and learning from the pairs directly."""
