"""N-gram cache of verified text: proposes tokens that sharpen the frozen draft. It changes drafts, never the output."""
