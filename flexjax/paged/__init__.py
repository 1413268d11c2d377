"""Paged caches of keys and values: sequences take pages as they grow, and share those of common prefixes."""

from flexjax.paged.allocate import allocate as allocate
from flexjax.paged.allocate import reserve as reserve
from flexjax.paged.append import append as append
from flexjax.paged.append import extend as extend
from flexjax.paged.append import write as write
from flexjax.paged.cache import PagedCache as PagedCache
from flexjax.paged.errors import PageError as PageError
from flexjax.paged.fork import fork as fork
from flexjax.paged.free import free as free
