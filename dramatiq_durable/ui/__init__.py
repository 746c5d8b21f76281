"""The page that shows what a namespace holds: ``dramatiq-durable ui``.  It takes the extra ``[ui]``."""
