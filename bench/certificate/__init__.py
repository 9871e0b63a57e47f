"""What proving drafts without the cold rows costs and saves."""
