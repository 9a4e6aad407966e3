"""Target versions on disk: how they are stored, whether deployed drafts fit them, and which of them are served."""
