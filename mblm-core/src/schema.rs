//! Reads JSON Schemas from untrusted authors. References may form a cycle, and a few lines may expand to more than fits
//! in memory, so every walk is bounded.

use std::cell::Cell;

use serde_json::Value;

/// How many schemas may lie within each other, references followed.
const DEEPEST: u32 = 32;
/// How many schemas a walk may visit in all.
const MOST: u32 = 10_000;

/// A walk through one schema, for a recursive function that enters each schema before it looks at it.
pub struct Walk<'a> {
    root: &'a Value,
    depth: Cell<u32>,
    visited: Cell<u32>,
}

impl<'a> Walk<'a> {
    /// A walk through `root`, where references begin.
    pub fn new(root: &'a Value) -> Self {
        Walk { root, depth: Cell::new(0), visited: Cell::new(0) }
    }

    /// Does `work` with `schema`, or with what its `$ref` leads to. `None` if that is nothing or a circle, and if the walk
    /// went too deep or too far.
    pub fn enter<R>(&self, schema: &'a Value, work: impl FnOnce(&'a Value) -> R) -> Option<R> {
        let schema = self.follow(schema)?;
        if self.depth.get() == DEEPEST || self.visited.get() == MOST {
            return None;
        }
        self.visited.set(self.visited.get() + 1);
        self.depth.set(self.depth.get() + 1);
        let done = work(schema);
        self.depth.set(self.depth.get() - 1);
        Some(done)
    }

    fn follow(&self, mut schema: &'a Value) -> Option<&'a Value> {
        for _ in 0..DEEPEST {
            match schema.get("$ref").and_then(Value::as_str) {
                Some(target) => schema = self.root.pointer(target.strip_prefix('#')?)?,
                None => return Some(schema),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// How many schemas a walk over all `anyOf` visits.
    fn visits(root: &Value) -> u32 {
        fn visit<'a>(walk: &Walk<'a>, schema: &'a Value) {
            walk.enter(schema, |schema| {
                schema["anyOf"].as_array().into_iter().flatten().for_each(|schema| visit(walk, schema));
            });
        }
        let walk = Walk::new(root);
        visit(&walk, root);
        walk.visited.get()
    }

    #[test]
    fn references_are_followed() {
        let root = json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "null"}}});
        assert_eq!(Walk::new(&root).enter(&root, |schema| schema["type"] == "null"), Some(true));
        let nothing = json!({"$ref": "#/$defs/none"});
        assert_eq!(Walk::new(&nothing).enter(&nothing, |_| ()), None);
    }

    #[test]
    fn circles_and_avalanches_end() {
        let circle = json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}});
        assert_eq!(visits(&circle), 0);
        assert_eq!(visits(&json!({"$ref": "#"})), 0);
        assert_eq!(visits(&json!({"anyOf": [{"$ref": "#"}]})), DEEPEST);
        let mut avalanche = json!({"anyOf": [{"$ref": "#/$defs/0"}]});
        for i in 0..30 {
            let next = json!({"$ref": format!("#/$defs/{}", i + 1)});
            avalanche["$defs"][i.to_string()] = json!({"anyOf": [next, next]});
        }
        assert_eq!(visits(&avalanche), MOST);
    }
}
