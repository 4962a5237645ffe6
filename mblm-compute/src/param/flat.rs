//! All gradients of a store in one flat piece of memory, so that several processes add theirs up in one go.

use std::ops::Range;
use std::sync::{Arc, MutexGuard};

use super::arena::Arena;
use super::gradient::Gradient;
use super::store::ParamStore;
use crate::error::Result;

impl ParamStore {
    /// Which parameters have a gradient, in the order of the store.
    pub fn gradients_there(&self) -> Vec<bool> {
        self.iter().map(|param| param.grad().is_there()).collect()
    }

    /// Runs `work` on all gradients at once, those of one parameter after those of the one before. Afterwards the
    /// parameters that are marked in `there` have a gradient, and the others have none.
    ///
    /// The first call moves the gradients of the CPU into one piece of memory, in which they stay. Those of other devices
    /// are copied in, and back.
    ///
    /// # Errors
    /// Those of `work` and of a device.
    pub fn flat_gradients(&self, there: &[bool], work: impl FnOnce(&mut [f32])) -> Result<()> {
        let arena = self.arena.get_or_init(|| Arc::new(Arena::new(self.num_elements())));
        let mut locked: Vec<MutexGuard<Gradient>> = self.iter().map(|param| param.grad()).collect();
        let mut end = 0;
        let ranges: Vec<Range<usize>> =
            self.iter().map(|param| (end..end + param.len(), end += param.len()).0).collect();
        for ((param, grad), range) in self.iter().zip(&mut locked).zip(&ranges) {
            match param.place().is_host() {
                true => grad.move_to(arena, range.clone()),
                // SAFETY: all locks are held, and what is read of a tensor lies elsewhere.
                false => match (grad.is_there(), unsafe { arena.part_mut(range.clone()) }) {
                    (true, part) => part.copy_from_slice(grad),
                    (false, part) => part.fill(0.0),
                },
            }
        }
        // SAFETY: all locks are held, and no gradient is borrowed.
        work(unsafe { arena.part_mut(0..end) });
        let found = self.iter().zip(&mut locked).zip(ranges).zip(there);
        for (((param, grad), range), _) in found.filter(|(_, there)| **there) {
            match param.place().is_host() {
                true => grad.allocate(param.len()),
                // SAFETY: all locks are held, and nothing is changed.
                false => grad.set_tensor(param.placed(unsafe { arena.part(range) }.to_vec())?),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::device::Place;
    use crate::param::Init;

    fn store(place: Place) -> ParamStore {
        let mut store = ParamStore::new(0).at(place);
        for (name, len) in [("a", 2), ("b", 3), ("c", 1)] {
            store.root().param(name, &[len], Init::Const(0.0)).unwrap();
        }
        store
    }

    fn grads(store: &ParamStore) -> Vec<Vec<f32>> {
        store.iter().map(|param| param.grad().to_vec()).collect()
    }

    /// Gradients come in, are changed in place, and go on where they are; those that nobody has stay away.
    fn changes_in_place(store: &ParamStore) {
        let [a, b, c] = ["a", "b", "c"].map(|name| store.get(name).unwrap());
        a.set_grad(&[1.0, 2.0]).unwrap();
        assert_eq!(store.gradients_there(), [true, false, false]);
        let add_ten = |flat: &mut [f32]| flat.iter_mut().take(5).for_each(|x| *x += 10.0);
        store.flat_gradients(&[true, true, false], add_ten).unwrap();
        assert_eq!(grads(store), [vec![11.0, 12.0], vec![10.0; 3], vec![]]);
        store.zero_grad();
        c.set_grad(&[7.0]).unwrap();
        b.set_grad(&[1.0, 2.0, 3.0]).unwrap();
        let mut seen = vec![];
        store.flat_gradients(&[true; 3], |flat| seen = flat.to_vec()).unwrap();
        assert_eq!(seen, [0.0, 0.0, 1.0, 2.0, 3.0, 7.0]);
        assert_eq!(grads(store), [vec![0.0; 2], vec![1.0, 2.0, 3.0], vec![7.0]]);
    }

    #[test]
    fn gradients_of_the_cpu_lie_in_one_piece() {
        changes_in_place(&store(Place::default()));
    }

    #[test]
    fn those_of_other_places_are_copied_in_and_back() {
        changes_in_place(&store(Place { device: Device::Cpu, dtype: DType::F64 }));
    }

    #[test]
    fn a_gradient_outlives_its_store() {
        let store = store(Place::default());
        store.flat_gradients(&[true; 3], |flat| flat.fill(3.0)).unwrap();
        let kept = store.get("b").unwrap().clone();
        drop(store);
        kept.grad_mut()[0] += 1.0;
        assert_eq!(**kept.grad(), [4.0, 3.0, 3.0]);
    }
}
