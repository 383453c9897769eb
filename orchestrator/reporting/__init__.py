"""What a person sees: progress, plans, reports, pages."""
