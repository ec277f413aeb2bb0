"""The control plane: accepts jobs, keeps their state, starts attempts on Ray and reads what they leave behind."""
